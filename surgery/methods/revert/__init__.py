"""Taking one input out of a pack."""
