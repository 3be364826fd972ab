"""What stands on the page of the theory: the paper's claims in a dozen rows, and the questions behind them."""
