"""The policy, the base model from which the policy is made, and the loss of the policy."""
