"""The kernel side: programs, maps, hooks, targets. `plane.DataPlane` is its face."""
