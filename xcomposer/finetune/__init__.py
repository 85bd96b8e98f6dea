"""Fine-tuning: `formats` reads files, `data` makes batches, `modes` says what is trained, `training` trains."""
