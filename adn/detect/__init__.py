"""What detectors share whatever their architecture: boxes, targets, matching, from outputs to objects, drawing."""
