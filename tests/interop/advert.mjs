// Adverts: docs/protocol.md, "Adverts".

import { isIPv4, isIPv6 } from 'node:net'
import { publicKeyOf, verify } from './identity.mjs'
import { decode, encode } from './msgpack.mjs'

const TAG = Buffer.from('rios/advert/1\0')
const BEAT_TAG = Buffer.from('rios/heartbeat/1\0')
const BYTES_MAX = 64 << 10
const BEAT_BYTES_MAX = 4096
const LIFE_MS_MAX = 24 * 3600 * 1000
const SKEW_MS_MAX = 10 * 60 * 1000
const PRICE_MAX = 1n << 40n
const COORDINATE_MAX = 60_000_000n
const LABEL = '[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?'
const NAME = new RegExp(`^(?=.{1,253}$)${LABEL}(?:\\.${LABEL})*\\.?$`)
const PEER = '/p2p/([1-9A-HJ-NP-Za-km-z]{20,80})'
const ANY_ADDRESS = /^(?:\/[!-.0-~]+)+$/
const OUR_ADDRESS = /^\/(?:ip4|ip6|dns|dns4|dns6)\/[^/]*\/tcp\/[^/]*(?:\/p2p(?:-circuit)?(?:\/.*)?)?$/s
const ADDRESS = new RegExp(`^/(ip4|ip6|dns|dns4|dns6)/([0-9A-Za-z_:.-]{1,254})/tcp/(\\d{1,5})(?:${PEER})?(/p2p-circuit(?:${PEER})?)?$`)

export class BadAdvert extends Error {
  constructor (kind, message) {
    super(`${kind}: ${message}`)
    this.kind = kind
  }
}

// -- fields: each reader returns the value or throws

function need (condition, what) {
  if (!condition) throw new BadAdvert('malformed', what)
}

const text = (max = 256, min = 0) => value => {
  need(typeof value === 'string' && [...value].length <= max && [...value].length >= min, `a text of ${min} to ${max} characters`)
  return value
}
const integer = (max = 1n << 62n, min = 0n) => value => {
  const whole = typeof value === 'bigint' || (typeof value === 'number' && Number.isInteger(value))
  need(whole && BigInt(value) >= min && BigInt(value) <= max, `an integer up to ${max}`)
  return value
}
const bytes = max => value => {
  need(value instanceof Uint8Array && value.length <= max, `at most ${max} bytes`)
  return value
}
const flag = value => {
  need(typeof value === 'boolean', 'true or false')
  return value
}
const list = (item, max) => value => {
  need(Array.isArray(value) && value.length <= max, `a list of at most ${max}`)
  return value.map(item)
}
// what a later version appended is skipped, what an earlier one lacks takes its default (none: the field is required)
const record = fields => value => {
  need(Array.isArray(value), 'an array')
  return fields.map(([name, read, fallback], index) => {
    if (index < value.length) return read(value[index])
    need(fallback !== undefined, `the field ${name}`)
    return fallback
  })
}

const GPU = record([['name', text()], ['memory_bytes', integer()]])
const HARDWARE = record([
  ['cpu', text(), ''], ['cores', integer(), 0], ['ram_bytes', integer(), 0], ['gpus', list(GPU, 64), []],
  ['expert_kflop_per_s', integer(), 0], ['memory_bytes_per_s', integer(), 0]
])
const OFFER = record([
  ['model_id', text(64, 64)], ['shards', bytes(8192)], ['quote', integer()],
  ['microcredits_per_tflop', integer(PRICE_MAX)], ['microcredits_per_kv_unit', integer(PRICE_MAX)]
])
export const FIELDS = [
  ['peer_id', text()],
  ['seq', integer()],
  ['expires_ms', integer()],
  ['addresses', list(text(), 16), []],
  ['lane', text(), ''],
  ['version', text(), ''],
  ['region', text(), ''],
  ['hardware', HARDWARE, HARDWARE([])],
  ['disk_bytes', integer(), 0],
  ['offered_bytes', integer(), 0],
  ['full', flag, false],
  ['load', integer(), 0],
  ['roles', list(text(), 16), []],
  ['models', list(OFFER, 64), []],
  ['net', bytes(64), new Uint8Array()],
  ['paused', flag, false],
  ['reach', text(16), ''],
  ['relay', flag, false],
  ['capabilities', list(text(), 32), []],
  ['coordinate', list(integer(COORDINATE_MAX, -COORDINATE_MAX), 8), []]
]

const PRICES = record([['quote', integer()], ['per_tflop', integer(PRICE_MAX)], ['per_kv_unit', integer(PRICE_MAX)]])
export const BEAT_FIELDS = [
  ['peer_id', text()],
  ['seq', integer()],
  ['load', integer(), 0],
  ['paused', flag, false],
  ['price', value => value === null ? null : exactly(3, PRICES)(value), null]
]

function exactly (length, read) {
  return value => {
    need(Array.isArray(value) && value.length === length, `an array of ${length}`)
    return read(value)
  }
}

export function signAdvert (identity, fields) {
  const all = { peer_id: identity.peerId, ...fields }
  const body = encode(FIELDS.map(([name, , fallback]) => all[name] ?? fallback))
  return encode([body, identity.sign(TAG, body)])
}

export function openAdvert (data, nowMs) {
  const advert = open(data, FIELDS, TAG, BYTES_MAX)
  checkSense(advert)
  const now = BigInt(nowMs)
  if (BigInt(advert.expires_ms) <= now) throw new BadAdvert('expired', advert.peer_id)
  if (BigInt(advert.expires_ms) - now > LIFE_MS_MAX + SKEW_MS_MAX || BigInt(advert.seq) > now + BigInt(SKEW_MS_MAX)) {
    throw new BadAdvert('future', advert.peer_id)
  }
  return advert
}

export function openHeartbeat (data, nowMs) {
  const beat = open(data, BEAT_FIELDS, BEAT_TAG, BEAT_BYTES_MAX)
  const age = BigInt(nowMs) - BigInt(beat.seq)
  if (age < -SKEW_MS_MAX) throw new BadAdvert('future', beat.peer_id)
  if (age > SKEW_MS_MAX) throw new BadAdvert('expired', beat.peer_id)
  return beat
}

// what `[body, signature]` says, by field, once it is known that the peer it names signed it
function open (data, fields, tag, bytesMax) {
  if (data.length > bytesMax) throw new BadAdvert('too_large', `${data.length} bytes`)
  const [body, signature] = unpack(data)
  need(body instanceof Uint8Array && signature instanceof Uint8Array, 'an envelope of two byte strings')
  need(encode([body, signature]).equals(data), 'an envelope in its shortest encoding')
  const values = record(fields)(unpack(body))
  const read = Object.fromEntries(fields.map(([name], index) => [name, values[index]]))
  let key
  try {
    key = publicKeyOf(read.peer_id)
  } catch (error) {
    throw new BadAdvert('malformed', error.message)
  }
  if (!verify(key, tag, body, signature)) throw new BadAdvert('signature', read.peer_id)
  return read
}

function unpack (data) {
  let value
  try {
    value = decode(data, { lenient: true })
  } catch (error) {
    throw new BadAdvert('malformed', error.message)
  }
  need(Array.isArray(value), 'an array')
  return value
}

function isHost (kind, host) {
  return kind === 'ip4' ? isIPv4(host) : kind === 'ip6' ? isIPv6(host) : NAME.test(host)
}

function checkSense (advert) {
  for (const address of advert.addresses) {
    const match = ADDRESS.exec(address)
    const port = Number(match?.[3])
    if (match === null && ANY_ADDRESS.test(address) && !OUR_ADDRESS.test(address)) continue // of a later version
    if (match === null || !isHost(match[1], match[2]) || port < 1 || port > 65535) throw new BadAdvert('absurd', `the address ${address}`)
    const peer = match[5] === undefined ? match[4] : match[6]
    if (peer !== undefined && peer !== advert.peer_id) throw new BadAdvert('absurd', `another peer's address ${address}`)
  }
  const models = advert.models.map(([modelId]) => modelId)
  if (new Set(models).size < models.length) throw new BadAdvert('absurd', 'one model twice')
  const [cpu, , , gpus] = advert.hardware
  const words = [advert.lane, advert.version, advert.region, advert.reach, cpu, ...gpus.map(([name]) => name)]
  if ([...words, ...advert.roles, ...advert.capabilities].some(word => /[\p{C}\p{Z}]/u.test(word.replaceAll(' ', '')))) {
    throw new BadAdvert('absurd', 'a text that is not printable')
  }
}
