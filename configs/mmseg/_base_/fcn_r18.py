# FCN on a ResNet-18 ticket: a light head on all four stages, each resized to stride 4, because what
# is small or thin is lost at stride 32 alone.
norm_cfg = dict(type="BN", requires_grad=True)  # SyncBN needs a GPU
model = dict(
    type="EncoderDecoder",
    # The ticket's input: RGB with ImageNet's mean and std. A contradicting input is an error.
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
    ),
    backbone=dict(
        type="TicketResNet",
        depth=18,
        norm_cfg=norm_cfg,
        init_cfg=dict(type="Ticket", checkpoint=None),  # give --ticket FILE, or write a file here
    ),
    decode_head=dict(
        type="FCNHead",
        input_transform="resize_concat",
        in_index=(0, 1, 2, 3),
        in_channels=(64, 128, 256, 512),
        channels=64,
        kernel_size=1,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
    test_cfg=dict(mode="whole"),
)
