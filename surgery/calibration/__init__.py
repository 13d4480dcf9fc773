"""Text to statistics: a corpus, the stock model layer by layer, sums that methods reuse."""
