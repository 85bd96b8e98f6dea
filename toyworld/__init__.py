"""A checkpoint of this architecture small enough to ship, the world it knows, its training and its examination."""
