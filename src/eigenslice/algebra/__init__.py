"""Pure functions on tensors. Tokens are rows; weights are out x in, as in torch. No models in here."""
