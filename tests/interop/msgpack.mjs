// msgpack: shortest form out; in, no extension types, no broken UTF-8, text keys only, nothing behind the value. A lenient
// reading makes `undefined` of what is not allowed, which is for what a later version appended and nobody looks at.
// Integers beyond 2**53 are BigInts. Maps are objects without prototype.

const UTF8 = new TextDecoder('utf-8', { fatal: true })
const DEPTH_MAX = 100

export function encode (value) {
  const parts = []
  write(parts, value)
  return Buffer.concat(parts)
}

export function decode (data, { lenient = false } = {}) {
  const reader = { data: Buffer.from(data.buffer, data.byteOffset, data.byteLength), at: 0, lenient }
  const value = read(reader, 0)
  if (reader.at !== reader.data.length) throw new Error('msgpack: bytes behind the value')
  return value
}

function head (parts, code, size, value) {
  const out = Buffer.alloc(1 + size)
  out.writeUInt8(code)
  if (size === 8) out.writeBigUInt64BE(BigInt.asUintN(64, BigInt(value)), 1)
  else if (size > 0) out.writeUIntBE(value, 1, size)
  parts.push(out)
}

// [largest length, code, bytes of the length] of each form, shortest first
const FORMS = {
  text: [[31, 0xa0, 0], [0xff, 0xd9, 1], [0xffff, 0xda, 2], [0xffffffff, 0xdb, 4]],
  bytes: [[0xff, 0xc4, 1], [0xffff, 0xc5, 2], [0xffffffff, 0xc6, 4]],
  array: [[15, 0x90, 0], [0xffff, 0xdc, 2], [0xffffffff, 0xdd, 4]],
  map: [[15, 0x80, 0], [0xffff, 0xde, 2], [0xffffffff, 0xdf, 4]]
}

function start (parts, form, length) {
  const [, code, size] = FORMS[form].find(([max]) => length <= max)
  head(parts, size === 0 ? code | length : code, size, length)
}

function write (parts, value) {
  if (value === null || value === undefined) head(parts, 0xc0, 0)
  else if (typeof value === 'boolean') head(parts, value ? 0xc3 : 0xc2, 0)
  else if (typeof value === 'bigint' || Number.isInteger(value)) writeInteger(parts, BigInt(value))
  else if (typeof value === 'number') {
    const out = Buffer.alloc(9, 0xcb)
    out.writeDoubleBE(value, 1)
    parts.push(out)
  } else if (typeof value === 'string') {
    const text = Buffer.from(value)
    start(parts, 'text', text.length)
    parts.push(text)
  } else if (value instanceof Uint8Array) {
    start(parts, 'bytes', value.length)
    parts.push(value)
  } else if (Array.isArray(value)) {
    start(parts, 'array', value.length)
    value.forEach(item => write(parts, item))
  } else {
    start(parts, 'map', Object.keys(value).length)
    for (const [key, item] of Object.entries(value)) {
      write(parts, key)
      write(parts, item)
    }
  }
}

function writeInteger (parts, value) {
  if (value >= 0n && value <= 0x7fn) head(parts, Number(value), 0)
  else if (value < 0n && value >= -32n) head(parts, 256 + Number(value), 0)
  else if (value >= 0n) {
    const index = [1, 2, 4].findIndex(size => value < 1n << BigInt(8 * size))
    if (index >= 0) head(parts, 0xcc + index, 1 << index, Number(value))
    else head(parts, 0xcf, 8, value)
  } else {
    const index = [1, 2, 4].findIndex(size => value >= -(1n << BigInt(8 * size - 1)))
    if (index >= 0) head(parts, 0xd0 + index, 1 << index, Number(BigInt.asUintN(8 << index, value)))
    else head(parts, 0xd3, 8, value)
  }
}

function take (reader, count) {
  if (reader.at + count > reader.data.length) throw new Error('msgpack: cut off')
  reader.at += count
  return reader.data.subarray(reader.at - count, reader.at)
}

const unsigned = (reader, size) => take(reader, size).readUIntBE(0, size)

function small (value) {
  return value >= Number.MIN_SAFE_INTEGER && value <= Number.MAX_SAFE_INTEGER ? Number(value) : value
}

function read (reader, depth) {
  if (depth > DEPTH_MAX) throw new Error('msgpack: nested too deeply')
  const code = unsigned(reader, 1)
  if (code <= 0x7f) return code
  if (code >= 0xe0) return code - 256
  if (code <= 0x8f) return readMap(reader, code & 15, depth)
  if (code <= 0x9f) return readArray(reader, code & 15, depth)
  if (code <= 0xbf) return text(reader, code & 31)
  if (code === 0xc0) return null
  if (code === 0xc2 || code === 0xc3) return code === 0xc3
  if (code >= 0xc4 && code <= 0xc6) return take(reader, unsigned(reader, 1 << (code - 0xc4)))
  if (code === 0xca) return take(reader, 4).readFloatBE()
  if (code === 0xcb) return take(reader, 8).readDoubleBE()
  if (code >= 0xcc && code <= 0xce) return unsigned(reader, 1 << (code - 0xcc))
  if (code === 0xcf) return small(take(reader, 8).readBigUInt64BE())
  if (code >= 0xd0 && code <= 0xd2) return take(reader, 1 << (code - 0xd0)).readIntBE(0, 1 << (code - 0xd0))
  if (code === 0xd3) return small(take(reader, 8).readBigInt64BE())
  if (code >= 0xd9 && code <= 0xdb) return text(reader, unsigned(reader, 1 << (code - 0xd9)))
  if (code === 0xdc || code === 0xdd) return readArray(reader, unsigned(reader, 2 << (code - 0xdc)), depth)
  if (code === 0xde || code === 0xdf) return readMap(reader, unsigned(reader, 2 << (code - 0xde)), depth)
  if (reader.lenient && code >= 0xc7 && code <= 0xc9) return skip(reader, 1 + unsigned(reader, 1 << (code - 0xc7)))
  if (reader.lenient && code >= 0xd4 && code <= 0xd8) return skip(reader, 1 + (1 << (code - 0xd4)))
  throw new Error(`msgpack: the byte ${code}`)
}

function skip (reader, count) {
  take(reader, count)
}

function text (reader, count) {
  const data = take(reader, count)
  try {
    return UTF8.decode(data)
  } catch (error) {
    if (!reader.lenient) throw error
  }
}

function readArray (reader, length, depth) {
  const items = []
  for (let index = 0; index < length; index++) items.push(read(reader, depth + 1))
  return items
}

function readMap (reader, length, depth) {
  const map = Object.create(null)
  for (let index = 0; index < length; index++) {
    const key = read(reader, depth + 1)
    if (typeof key !== 'string' && !reader.lenient) throw new Error('msgpack: a key that is no text')
    map[key] = read(reader, depth + 1)
  }
  return map
}
