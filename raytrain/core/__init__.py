"""Base types: threat models, losses, counted passes, training state, and the process."""
