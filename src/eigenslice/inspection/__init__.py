"""What a checkpoint holds, and what slicing would store and take."""
