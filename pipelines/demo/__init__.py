"""The whole way on a data set drawn from nothing."""
