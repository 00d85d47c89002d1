"""What routers and balancers share: learned gates, capacity, balance losses, and random choices with addresses."""
