"""What the commands are made of; each module says at its top what it does."""
