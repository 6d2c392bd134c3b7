// Ed25519 identities, peer ids and tagged signatures: docs/protocol.md, "Identity".

import { createPrivateKey, createPublicKey, sign as signRaw, verify as verifyRaw } from 'node:crypto'
import { ed25519 } from '@noble/curves/ed25519.js'
import { base58btc } from 'multiformats/bases/base58'

const PEER_ID_PREFIX = Buffer.from('002408011220', 'hex')
const SEED_PREFIX = Buffer.from('302e020100300506032b657004220420', 'hex') // PKCS #8, RFC 8410
const KEY_PREFIX = Buffer.from('302a300506032b6570032100', 'hex') // SubjectPublicKeyInfo, RFC 8410

export function peerIdOf (publicKey) {
  return base58btc.baseEncode(Buffer.concat([PEER_ID_PREFIX, publicKey]))
}

export function publicKeyOf (peerId) {
  const raw = Buffer.from(base58btc.baseDecode(peerId))
  if (raw.length !== 38 || !raw.subarray(0, 6).equals(PEER_ID_PREFIX)) {
    throw new Error(`${peerId} is not an Ed25519 peer id`)
  }
  return raw.subarray(6)
}

export class Identity {
  constructor (seed) {
    this.key = createPrivateKey({ key: Buffer.concat([SEED_PREFIX, seed]), format: 'der', type: 'pkcs8' })
    this.publicKey = createPublicKey(this.key).export({ format: 'der', type: 'spki' }).subarray(-32)
    this.peerId = peerIdOf(this.publicKey)
  }

  sign (tag, body) {
    return signRaw(null, Buffer.concat([tag, body]), this.key)
  }
}

// libraries disagree on keys outside the prime-order group, so they are refused before anything is verified
function isValidKey (publicKey) {
  if (publicKey.length !== 32) return false
  try {
    const point = ed25519.Point.fromBytes(publicKey)
    return point.isTorsionFree() && !point.isSmallOrder()
  } catch {
    return false
  }
}

export function verify (publicKey, tag, body, signature) {
  if (signature.length !== 64 || !isValidKey(publicKey)) return false
  const key = createPublicKey({ key: Buffer.concat([KEY_PREFIX, publicKey]), format: 'der', type: 'spki' })
  return verifyRaw(null, Buffer.concat([tag, body]), key, signature)
}
