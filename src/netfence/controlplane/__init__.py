"""A library to write control planes with, and `netfenced controlplane`, which is one made with it."""
