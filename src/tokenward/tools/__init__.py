"""What people do with runs: plan them, compare them, talk to their models, give the models away."""
