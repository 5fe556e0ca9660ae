"""`dprlhf sweep`: what privacy costs, as a table of runs at several budgets and of controls."""
