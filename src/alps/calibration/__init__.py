"""Running of blocks on calibration data: block inputs, hooks, input statistics, experts, dense reference."""
