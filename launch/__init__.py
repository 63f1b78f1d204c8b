"""Commands that train, evaluate and measure models with multipole semantic attention."""
