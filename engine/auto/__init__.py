"""`--config auto`: a run's options, chosen by its data, this machine and the hours it may take."""
