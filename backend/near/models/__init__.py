"""The networks. Import from the modules: `iad`, `lad`, `gaussians`, `basis`, `tokenizer`, `encoder`, `flow`, ..."""
