"""implicit's interface: methods and attributes that the estimator is composed of."""
