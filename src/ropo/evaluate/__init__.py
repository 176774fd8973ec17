"""What a finished model is worth: answers in the formats of public benchmarks, win rates, detection measures."""
