"""The experts of untouched models in graphs of torch.compile: found, understood, replaced by ops of moecc."""
