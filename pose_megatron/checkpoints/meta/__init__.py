"""Meta's own format of LLaMA: params.json and consolidated.NN.pth."""
