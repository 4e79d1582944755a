"""What each parameter of a model is: how it is seen as matrices, and by which rule."""
