"""What everything else is made of: threat models, losses, passes that are counted, state, and the process."""
