"""Many students from one cache: which trainings there are, how they are run, and what they say together."""
