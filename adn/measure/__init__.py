"""What a net is worth at each depth: accuracy, average precision, multiply-adds, latency; and statistics estimated for
one depth. Reads nets, never trains them."""
