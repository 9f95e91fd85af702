"""DeepShape's mathematics: histograms on a grid, their specification, the scale's compensation, the quantile pull."""
