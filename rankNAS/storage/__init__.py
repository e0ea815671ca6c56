"""The record of a study in Optuna: transactions, claims, retries."""
