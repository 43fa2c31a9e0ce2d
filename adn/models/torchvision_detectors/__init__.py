"""torchvision's detectors by name, their any-depth forms (Faster R-CNN, Mask R-CNN and RetinaNet of the paper), and how
such a detector, whoever made it, is trained and evaluated."""
