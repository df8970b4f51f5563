"""What a person looks at after a run: one HTML page that needs nothing but itself."""
