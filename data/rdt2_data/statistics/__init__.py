"""The numbers of a dataset, per channel: moments, quantiles, histograms, and normalizers made of them."""
