"""The interface of SNELLA and every baseline; authors of methods import `snella.method`."""
