"""What is learnt from preferences, rewards and teachers: objectives, and the mathematics that they need."""
