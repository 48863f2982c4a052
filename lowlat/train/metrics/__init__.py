"""What a training run says about itself: records, log, TensorBoard files, live view, report."""
