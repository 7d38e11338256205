"""Networks: the residual encoder U-Net and the sparse masked autoencoder around it."""
