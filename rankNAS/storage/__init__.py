"""Study storage in Optuna: transactions, claims, retries."""
