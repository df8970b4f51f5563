"""Export a trained policy, or only its adapter, in a format that other tools can load."""
