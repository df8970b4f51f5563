"""The training loop, and the learners that it trains: the critic, then the policy."""
