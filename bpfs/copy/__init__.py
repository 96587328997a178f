"""bpcp's other half: what runs at every place of a copy. Only the standard library, for its start-up time."""
