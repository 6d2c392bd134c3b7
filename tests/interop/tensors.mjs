// Rows of activations and the digest of an expert call: docs/protocol.md, "Expert calls".

import { createHash } from 'node:crypto'

const SIZE_MAX = 1 << 20

function need (condition) {
  if (!condition) throw new Error('tensor')
}

export function decodeRows ({ shape, dtype = 'fp16', bf16 }, buffer) {
  need(Array.isArray(shape) && shape.length === 2 && shape.every(Number.isInteger))
  const [rows, width] = shape
  need(rows >= 0 && rows <= SIZE_MAX && width >= 1 && width <= SIZE_MAX && ['fp16', 'fp32'].includes(dtype))
  need(buffer.length === (dtype === 'fp16' ? 2 : 4) * rows * width)
  if (dtype === 'fp32') {
    const plain = Float32Array.from({ length: rows * width }, (_, index) => buffer.readFloatLE(4 * index))
    need(plain.every(Number.isFinite))
    return plain
  }
  need(bf16 === undefined || (bf16 instanceof Uint8Array && bf16.length === (rows + 7) >> 3))
  const values = new Float32Array(rows * width)
  const bits = new Uint32Array(values.buffer)
  for (let row = 0; row < rows; row++) {
    const wide = bf16 !== undefined && (bf16[row >> 3] >> (row & 7)) & 1
    for (let at = row * width; at < (row + 1) * width; at++) {
      const code = buffer.readUInt16LE(2 * at)
      if (wide) bits[at] = code << 16
      else values[at] = fromHalf(code)
      need(Number.isFinite(values[at]))
    }
  }
  return values
}

function fromHalf (code) {
  const sign = code & 0x8000 ? -1 : 1
  const exponent = (code >> 10) & 31
  const fraction = code & 0x3ff
  if (exponent === 31) return fraction ? NaN : sign * Infinity
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24)
}

const sha256 = (...parts) => parts.reduce((hash, part) => hash.update(part), createHash('sha256')).digest()

const digest = (buffers, bf16 = Buffer.alloc(0)) => {
  const size = Buffer.alloc(4)
  size.writeUInt32LE(bf16.length)
  return sha256(size, bf16, ...buffers)
}

export function leaf (model, layer, groups, rows, device, request, answer) {
  const kind = Buffer.from(device)
  const what = Buffer.alloc(5 + kind.length + 4 * (2 + groups.length))
  what.writeUInt8(kind.length, 0)
  what.writeUInt32LE(groups.length, 1)
  kind.copy(what, 5)
  ;[layer, rows, ...groups].forEach((number, index) => what.writeUInt32LE(number, 5 + kind.length + 4 * index))
  return sha256(Buffer.from('rios/leaf/2\0'), Buffer.from(model, 'hex'), what, digest(request), digest([answer]))
}

export function kflop (expertsOfGroups, flopsPerRow, rows, experts) {
  if (experts === undefined) return Math.floor(rows * flopsPerRow.reduce((sum, cost) => sum + cost, 0) / 1000)
  const chosen = Array.from({ length: experts.length / 4 }, (_, index) => experts.readInt32LE(4 * index))
  const flops = expertsOfGroups.map((members, group) => {
    const hits = chosen.filter(expert => members.includes(expert)).length
    return Math.floor(hits * flopsPerRow[group] / members.length)
  })
  return Math.floor(flops.reduce((sum, cost) => sum + cost, 0) / 1000)
}
