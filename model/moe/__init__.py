"""Mixture-of-Experts: router, dispatcher, experts, and what keeps them balanced."""
