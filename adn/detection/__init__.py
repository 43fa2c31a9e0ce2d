"""Detection: RT-DETR at any depth, its losses, COCO data and evaluation.

    net = adn.create_model("anydepth_rtdetr_r50vd")
    data = adn.detection.open_coco("coco", "val")
"""
