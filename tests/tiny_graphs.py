"""Graphs small enough to work out by hand: every value takes a multiple of 256 bytes, a scalar 256."""

CHAIN = """
graph chain(%x, %w) -> (%b1) {
  %x = Placeholder() : (float32[8,8])
  %w = Placeholder() : (float32[8,8])
  # Forward. Live after f3: x w f1 f2 f3.
  %f1 = MatMul(%x, %w) : (float32[8,8])
  %f2 = MatMul(%f1, %w) : (float32[8,8])
  %f3 = MatMul(%f2, %w) : (float32[8,8])
  # Backward. The peak is at b3: x w f1 f2 f3 b3, 6 * 256 bytes.
  %b3 = MatMul(%f3, %w) : (float32[8,8])
  %b2 = MatMul(%b3, %f2) : (float32[8,8])
  %b1 = MatMul(%b2, %f1) : (float32[8,8])
}
"""

DIAMOND = """
graph diamond(%x, %w) -> (%join) {
  %x = Placeholder() : (float32[8,8])
  %w = Placeholder() : (float32[8,16])
  # The peak is at join: x w left right join, 8 * 256 bytes.
  %top = MatMul(%x, %x) : (float32[8,8])
  %left = MatMul(%top, %x) : (float32[8,8])
  %right = MatMul(%top, %w) : (float32[8,16])
  %join = MatMul(%left, %right) : (float32[8,16])
}
"""

RESIDUAL = """
graph residual(%x, %w) -> (%grad_x) {
  %x = Placeholder() : (float32[8,8])
  %w = Placeholder() : (float32[8,8])
  # x + relu(x w), twice.
  %product1 = MatMul(%x, %w) : (float32[8,8])
  %relu1 = Relu(%product1) : (float32[8,8])
  %sum1 = AddV2(%x, %relu1) : (float32[8,8])
  %product2 = MatMul(%sum1, %w) : (float32[8,8])
  %relu2 = Relu(%product2) : (float32[8,8])
  %sum2 = AddV2(%sum1, %relu2) : (float32[8,8])
  %loss = L2Loss(%sum2) : (float32[])
  # The gradient of the loss with respect to x.
  %grad_relu2 = ReluGrad(%sum2, %relu2) : (float32[8,8])
  %grad_product2 = MatMul(%grad_relu2, %w) : (float32[8,8])
  %grad_sum1 = AddV2(%sum2, %grad_product2) : (float32[8,8])
  %grad_relu1 = ReluGrad(%grad_sum1, %relu1) : (float32[8,8])
  %grad_product1 = MatMul(%grad_relu1, %w) : (float32[8,8])
  %grad_x = AddV2(%grad_sum1, %grad_product1) : (float32[8,8])
}
"""

MLP_STEP = """
graph mlp_step(%x, %y, %w1, %w2) -> (%loss) after(%update2, %update1) {
  %x = Placeholder() : (float32[8,8])
  %y = Placeholder() : (float32[8,8])
  %w1 = Placeholder() {"held_bytes": [512]} : (resource[])
  %w2 = Placeholder() {"held_bytes": [512]} : (resource[])
  %rate = Const() : (float32[])
  # Forward: loss = sum((relu(x w1) w2 - y)^2) / 2.
  %read1 = ReadVariableOp!(%w1) : (float32[8,16])
  %hidden = MatMul(%x, %read1) : (float32[8,16])
  %relu = Relu(%hidden) : (float32[8,16])
  %read2 = ReadVariableOp!(%w2) : (float32[16,8])
  %logits = MatMul(%relu, %read2) : (float32[8,8])
  %error = Sub(%logits, %y) : (float32[8,8])
  %loss = L2Loss(%error) : (float32[])
  # Backward.
  %grad_w2 = MatMul(%relu, %error) : (float32[16,8])
  %grad_relu = MatMul(%error, %read2) : (float32[8,16])
  %grad_hidden = ReluGrad(%grad_relu, %relu) : (float32[8,16])
  %grad_w1 = MatMul(%x, %grad_hidden) : (float32[8,16])
  # Plain gradient descent.
  %step2 = Mul(%grad_w2, %rate) : (float32[16,8])
  %update2 = AssignSubVariableOp!(%w2, %step2) after(%read2) : ()
  %step1 = Mul(%grad_w1, %rate) : (float32[8,16])
  %update1 = AssignSubVariableOp!(%w1, %step1) after(%read1) : ()
}
"""
