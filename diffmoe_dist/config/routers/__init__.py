"""The settings of each router, a file a router; `model/routers/` has the routers themselves, by the same names."""
