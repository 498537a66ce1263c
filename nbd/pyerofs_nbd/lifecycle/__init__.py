"""Devices from the first attachment to the last detachment: holding, reattaching, supervising."""
