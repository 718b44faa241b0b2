"""Objects of a checkpoint: checked before they are unpickled, so that a hostile one can neither run code nor eat memory."""
