"""The transformer, the routers and the experts: one device, no ranks."""
