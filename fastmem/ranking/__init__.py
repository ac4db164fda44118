"""From statistics to a selection of units: scores, selections, their reliability, and the images behind them."""
